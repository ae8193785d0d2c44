"""One training run as data: what it is trained with, and the names of the curves that it leaves."""

from dataclasses import dataclass

from sgsc_core.checks import check, check_choice
from sgsc_study.gates import GATES, RELATIVES
from sgsc_study.optimizers import OPTIMIZERS

PLACEMENTS = ("before", "after")
HALVES = ("own-half", "other-half")
CONTROLS = ("none", "permuted", "layer-mean", "frozen", *HALVES)
SCHEDULES = ("constant", "cosine")
EPOCH_CURVES = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Run:
    """One training run. Runs of one `seed` share initial weights and batches, whatever else differs.

    >>> Run(seed=0, lr=0.01, gamma=0.25).placement
    'before'
    >>> Run(seed=0, lr=0.0)
    Traceback (most recent call last):
    ValueError: `lr` should be > 0. Found 0.0.

    `gamma` 0 is the plain optimizer. `placement` "before" gates the gradient that enters it (the card's method),
    "after" gates its finished update. `control` replaces the gate by one that keeps a part of it: "permuted" shuffles
    it over the entries of each weight or bias afresh each step, "layer-mean" puts its mean over each weight or bias in
    every entry, "frozen" keeps the first step's gate for good. With "own-half" and "other-half" the gradient is that of
    the first half of each batch, and the gate is that half's own or that of the other half. `gate` names another gate
    of `GATES`, or one of `RELATIVES`, which have no exponent and take `gamma` 1. `schedule` "cosine" lowers the
    learning rate to 0 over the run, `weight_decay` is decoupled, as AdamW's, `label_smoothing` is that of the training
    loss. `optimizer` is "adam", "sgd", with Nesterov's momentum of 0.9, or "muon". Raises TypeError or ValueError
    naming the field.
    """

    seed: int
    lr: float
    gamma: float = 0.0
    placement: str = "before"
    control: str = "none"
    gate: str = "sign"
    schedule: str = "constant"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        check("seed", self.seed, int, low=0)
        if check("lr", self.lr, float) <= 0:
            raise ValueError(f"`lr` should be > 0. Found {self.lr!r}.")
        check("gamma", self.gamma, float, low=0.0)
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("control", self.control, CONTROLS)
        check_choice("gate", self.gate, (*GATES, *RELATIVES))
        check_choice("schedule", self.schedule, SCHEDULES)
        check("weight_decay", self.weight_decay, float, low=0.0)
        check("label_smoothing", self.label_smoothing, float, low=0.0, high=1.0)
        check_choice("optimizer", self.optimizer, [*OPTIMIZERS])
        if self.control in HALVES and not self.gamma:
            raise ValueError(f"`gamma` should be > 0 for the control {self.control!r}. Found {self.gamma}.")
        if self.gate == "and-mask":
            check("gamma", self.gamma, float, high=1.0)  # a threshold of c
        if self.gate in RELATIVES and (self.gamma, self.control) != (1, "none"):
            raise ValueError(f"`gamma` should be 1, and `control` 'none', for the gate {self.gate!r}. Found {self}.")
        if self.gate == "cautious" and self.placement != "after":
            raise ValueError(f"`placement` should be 'after' for the gate 'cautious'. Found {self.placement!r}.")
