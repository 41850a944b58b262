"""A method that is added to the registry after the import: valid for --optim as soon as hf_efcp.register() is called again."""

ADD = """
import dataclasses
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
import hf_efcp
from hf_efcp import EFCPTrainingArguments, SparseMFAC
from hf_efcp.engine.formats import SparseFormat
from hf_efcp.engine.windowed import Windowed
from hf_efcp.optim import mfac
from hf_efcp.options import option, positive
from hf_efcp.registry import OptimizerInfo, add_optimizer

own = {"output_dir": "out", "use_cpu": True, "report_to": []}

@dataclasses.dataclass(frozen=True)
class ToyOptions(SparseMFAC.options_type):
    shrink: float = option(1.0, "what each coefficient is divided by", allowed="a finite number > 0", check=positive)

def shrunk(o, gram, j, w, dtype):
    return mfac.phi(o, gram, j, w, dtype) / o.shrink

class Toy(SparseMFAC):
    options_type = ToyOptions
    measured = {"window_size": 4}
    method = Windowed(SparseFormat, shrunk, mfac.solve)

add_optimizer(OptimizerInfo("efcp_toy_test", Toy, "a toy", "mfac", "sparse", "0000.00000"))
"""


def run(python, tmp_path, body):
    (tmp_path / "script.py").write_text(ADD + body)
    done = python("script.py")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_it_is_no_choice_before_register_and_one_after(python, tmp_path):
    printed = run(
        python,
        tmp_path,
        """
def is_choice():
    (choices,) = (a.choices for a in HfArgumentParser(TrainingArguments)._actions if a.dest == "optim")
    return "efcp_toy_test" in choices

print(is_choice())
try:
    TrainingArguments(optim="efcp_toy_test", **own)
except ValueError:
    print("refused")
hf_efcp.register()
print(is_choice(), TrainingArguments(optim="efcp_toy_test", **own).optim.value)
""",
    )
    assert printed == ["False", "refused", "True efcp_toy_test"]


def test_its_options_are_accepted_and_checked(python, tmp_path):
    printed = run(
        python,
        tmp_path,
        """
hf_efcp.register()
args = TrainingArguments(optim="efcp_toy_test", optim_args="shrink=2,density=0.5", **own)
cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
print(cls.__name__, kwargs["shrink"], kwargs["density"], cls([torch.nn.Parameter(torch.ones(3))], **kwargs).options.window_size)
print(hf_efcp.optimizer_cls_and_kwargs(args) == (cls, kwargs))
args = EFCPTrainingArguments(optim="efcp_toy_test", efcp_density=0.5, optim_args="shrink=2", **own)
print(hf_efcp.optimizer_cls_and_kwargs(args) == (cls, kwargs))
for name, optim_args in (
    ("efcp_toy_test", "shrink=0"),
    ("efcp_toy_test", "shrnk=2"),
    ("efcp_sparse_mfac", "shrink=2"),
    ("efcp_toy_tset", "shrink=2"),
):
    try:
        TrainingArguments(optim=name, optim_args=optim_args, **own)
    except hf_efcp.OptionError as error:
        print(error)
""",
    )
    assert printed[:3] == ["Toy 2.0 0.5 4", "True", "True"]
    assert printed[3] == "shrink=0.0: must be a finite number > 0"
    assert "did you mean 'shrink'" in printed[4]
    assert printed[5] == "optim_args: shrink='2': no option of efcp_sparse_mfac, but of efcp_toy_test"
    assert "did you mean 'efcp_toy_test'" in printed[6]


def test_it_is_listed_made_and_trained(python, tmp_path):
    printed = run(
        python,
        tmp_path,
        """
import torch
from hf_efcp.cli.main import main

hf_efcp.register()
assert main(["list", "efcp_toy*"]) == main(["list", "efcp_toy*", "--options"]) == 0

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1, bias=False)
    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}

def trained(shrink):
    torch.manual_seed(0)
    model = Model()
    before = model.linear.weight.detach().clone()
    options = f"shrink={shrink},update_rms=none"
    args = TrainingArguments(optim="efcp_toy_test", optim_args=options, max_steps=1, disable_tqdm=True, max_grad_norm=0, **own)
    trainer = Trainer(model, args, train_dataset=[{"x": torch.ones(4)}])
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Toy
    return model.linear.weight.detach() - before

one, four = trained(1), trained(4)
print(bool(one.any()), torch.allclose(one, 4 * four))
print(type(hf_efcp.create_optimizer("efcp_toy_test", Model(), lr=0.1, shrink=3)).__name__)
""",
    )
    assert printed[0] == printed[1] == "efcp_toy_test  a toy"
    assert any(line.split()[:4] == ["shrink", "float", "1.0", "1.0"] for line in printed)
    assert printed[-2:] == ["True True", "Toy"]
