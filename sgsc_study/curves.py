"""What training left: the curves of many runs, and their tidy tables.

It stands apart from `runs`, so that another measure of smoothness costs no training.
"""

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from sgsc_study.measures import smoothness
from sgsc_study.runs import EPOCH_CURVES, Run


@dataclass
class Curves:
    """What `train` recorded, as NumPy arrays: R runs, T steps, E epochs. A diverged run keeps its NaNs.

    `step_loss` is the loss of each step's batch before the update; `probe_loss` the loss of a fixed batch after it
    (T = 0 unless asked for). The epoch curves are full passes after the epochs in `evaluated`. `fresh_*` are of the
    final model on the fresh sample (NaN unless given).

    >>> from sgsc_study import load_mnist1d, train
    >>> curves = train([Run(0, lr=0.01)], load_mnist1d(100), epochs=4, batch_size=16, widths=(40, 10), n_jobs=1)
    >>> curves.step_loss.shape, curves.test_loss.shape  # 64 rows are 4 batches an epoch
    ((1, 16), (1, 4))
    """

    runs: list[Run]
    step_loss: np.ndarray  # [R, T]
    probe_loss: np.ndarray  # [R, T]
    train_loss: np.ndarray  # [R, E]
    train_accuracy: np.ndarray  # [R, E]
    valid_loss: np.ndarray  # [R, E]
    valid_accuracy: np.ndarray  # [R, E]
    test_loss: np.ndarray  # [R, E]
    test_accuracy: np.ndarray  # [R, E]
    fresh_loss: np.ndarray  # [R]
    fresh_accuracy: np.ndarray  # [R]
    evaluated: np.ndarray  # [E]

    def frame(self) -> pd.DataFrame:
        """Tidy: one row a run and evaluated epoch, with the run's fields and the six epoch curves.

        >>> from sgsc_study import load_mnist1d, train
        >>> train([Run(0, lr=0.01)], load_mnist1d(100), epochs=2, batch_size=16, widths=(40, 10)).frame().shape
        (2, 17)
        """
        n_runs, n_evaluated = self.train_loss.shape
        runs = pd.DataFrame([asdict(run) for run in self.runs]).loc[np.repeat(np.arange(n_runs), n_evaluated)]
        runs = runs.reset_index(drop=True).assign(epoch=np.tile(self.evaluated, n_runs))
        return runs.assign(**{name: getattr(self, name).ravel() for name in EPOCH_CURVES})

    def final(self) -> pd.DataFrame:
        """Tidy: one row a run, with the run's fields, what the last epoch gave, the fresh sample's accuracy, the mean
        test accuracy of the last 5 evaluated epochs, every smoothness measure of the training loss by epoch (`epoch_*`,
        where every epoch was evaluated) and, where a probe batch was recorded, of the probe loss by step (`probe_*`).

        >>> from sgsc_study import load_mnist1d, train
        >>> curves = train([Run(0, lr=0.01)], load_mnist1d(100), epochs=4, batch_size=16, widths=(40, 10))
        >>> curves.final().filter(like="roughness").columns.tolist()
        ['epoch_roughness']
        """
        last = {name: getattr(self, name)[:, -1] for name in EPOCH_CURVES if name != "train_accuracy"}
        last |= {"fresh_accuracy": self.fresh_accuracy, "late_test_accuracy": self.test_accuracy[:, -5:].mean(1)}
        frame = pd.DataFrame([asdict(run) for run in self.runs]).assign(**last)
        for name in frame.filter(like="accuracy"):  # shares of whole rows, as short decimals
            frame[name] = frame[name].astype(np.float64).round(6)
        by_epoch = self.train_loss if len(self.evaluated) == self.evaluated[-1] else self.train_loss[:, :0]
        for kind, loss in (("epoch", by_epoch), ("probe", self.probe_loss)):
            if loss.shape[1] >= 4:
                frame = frame.assign(**{f"{kind}_{name}": value for name, value in smoothness(loss).items()})
        return frame
