"""A LightningCLI that knows nothing of hf_efcp."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    """Two linear layers."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))

    def training_step(self, batch, number):
        """Give the loss."""
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)


class Data(LightningDataModule):
    """The sign of a sum."""

    def train_dataloader(self):
        """Give 8 batches."""
        print("data is loaded", flush=True)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)


if __name__ == "__main__":
    LightningCLI(Model, Data, seed_everything_default=0, save_config_callback=None)  # it refuses to write into a folder twice
