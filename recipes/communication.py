"""What comm="factors" sends, and what it trains: MiniLM-L6 on BBC sentences, on the processes of torchrun.

    torchrun --nproc_per_node 2 recipes/communication.py

Trains three times from the same start with `efcp_lowrank_mfac`: gradients all-reduced as ever, the factors instead, and the
factors with the whole window on every process (shard=off), which needs no updated parameters from the others. Prints, for each,
the numbers that a process gives to the collectives in a step, and the loss.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import hf_efcp
from hf_efcp.demo.bbc import bbc_news, minilm_folder

RUNS = {
    "gradients": {"comm": "gradients", "shard": "auto"},
    "factors": {"comm": "factors", "shard": "auto"},
    "factors, shard=off": {"comm": "factors", "shard": "off"},
}


class Counter:
    """Counts what this process gives to all-reduces and all-gathers, in bytes, by who asks for it."""

    def __init__(self):
        self.bytes = {"backward": 0, "step": 0}
        self.phase = "backward"
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather
        dist.all_reduce = self._counted(self._all_reduce, 0)
        dist.all_gather = self._counted(self._all_gather, 1)

    def _counted(self, function, argument):
        def call(*args, **kwargs):
            self.add(args[argument])
            return function(*args, **kwargs)

        return call

    def add(self, t: torch.Tensor) -> None:
        """Count a tensor that is sent."""
        self.bytes[self.phase] += t.numel() * t.element_size()

    def gradients(self, _, bucket):
        """A hook that does what DDP does without one, in sight of the counter."""
        dist.all_reduce(bucket.buffer().div_(dist.get_world_size()))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def train(options: dict, texts: list, labels: torch.Tensor, arguments: argparse.Namespace, counter: Counter):
    """One run; returns the mean loss of every step and the bytes of the last one."""
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=int(labels.max()) + 1)
    optimizer = hf_efcp.create_optimizer(
        "efcp_lowrank_mfac", model, lr=1e-4, **{**hf_efcp.optim_defaults("efcp_lowrank_mfac"), **options}
    )
    wrapped = DistributedDataParallel(model)
    if options["comm"] == "factors":
        optimizer.register_comm_hook(wrapped)
    else:
        wrapped.register_comm_hook(None, counter.gradients)
    losses = []
    for step in range(arguments.max_steps):
        chosen = torch.arange(step * arguments.batch_size, (step + 1) * arguments.batch_size) % len(texts)
        mine = chosen.chunk(dist.get_world_size())[dist.get_rank()]
        batch = tokenizer([texts[i] for i in mine], padding=True, truncation=True, max_length=48, return_tensors="pt")
        counter.bytes, counter.phase = {"backward": 0, "step": 0}, "backward"
        loss = wrapped(**batch, labels=labels[mine]).loss
        optimizer.zero_grad()
        loss.backward()
        counter.phase = "step"
        optimizer.step()
        sent = dict(counter.bytes)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses, sent, sum(optimizer.memory_footprint().values())


def main() -> None:
    """Run all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes together")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    data = bbc_news("sentences")["train"].shuffle(seed=0).select(range(arguments.max_steps * arguments.batch_size))
    texts, labels = list(data["text"]), torch.tensor(data["label"])
    counter = Counter()
    found = {name: train(options, texts, labels, arguments, counter) for name, options in RUNS.items()}
    if dist.get_rank() == 0:
        print("| run | sent in backward, MB a step | sent in step(), MB | state, MB, process 0 |\n|---|---|---|---|")
        for name, (_, sent, state) in found.items():
            print(f"| {name} | {sent['backward'] / 1e6:.2f} | {sent['step'] / 1e6:.2f} | {state / 1e6:.0f} |")
        print("\n| steps | " + " | ".join(f"loss, {name}" for name in found) + " |")
        print("|---" * (len(found) + 1) + "|")
        part = max(1, arguments.max_steps // 6)
        for start in range(0, arguments.max_steps, part):
            means = [sum(losses[start : start + part]) / len(losses[start : start + part]) for losses, *_ in found.values()]
            print(f"| {start + 1}-{min(start + part, arguments.max_steps)} | " + " | ".join(f"{x:.4f}" for x in means) + " |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
