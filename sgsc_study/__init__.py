"""The study: what tests SGSC. A module imports only those that stand before it in this list, column by column.

data        MNIST-1D and its splits                  curves     what runs left, as tidy tables
gates       SGSC's gate and its relatives            training   `train`: stacks of runs, from the cache
optimizers  Adam, SGD and Muon, for stacks           bank       every run of a grid, and what it says is best
runs        one run as data                          tabular    Optuna's searches of a bank, without training
engine      a stack of runs, step by step            search     Optuna's searches, on real training
anatomy     what the steps of a run do               parameters what a notebook's parameter may be
cnn         a convolutional network, by `SGSC`       results    result files, claims and shared tables
cache       what was computed, by which code         figures    captioned figures and tables
workers     processes, a cluster, the arithmetic     notebook   `begin`: a notebook's first cell
measures    smoothness, the verdict on two arms      testing    for the tests of a gate or rule of one's own

Cached runs depend on `engine`, `anatomy` and `cnn` and what they import; no change elsewhere trains them again.
"""

from sgsc_study.anatomy import anatomy
from sgsc_study.bank import (
    CELL,
    GRIDS,
    best_cell,
    border_hits,
    by_cell,
    compare_tuned,
    grown,
    race,
    rechosen,
    tuned_against,
    tuned_cells,
)
from sgsc_study.cache import CACHE, ROOT
from sgsc_study.cnn import mnist1d_cnn, train_cnn
from sgsc_study.curves import Curves
from sgsc_study.data import Dataset, draw_mnist1d, load_mnist1d
from sgsc_study.figures import (
    COLOURS,
    GREYS,
    figure,
    forest,
    in_words,
    name_lines,
    table,
    verdict_in_words,
    with_interval,
)
from sgsc_study.gates import GATES, RELATIVES, align_runs
from sgsc_study.measures import PairedComparison, compare_paired, in_halves, judged, smoothness
from sgsc_study.notebook import begin
from sgsc_study.results import claim, read_table, write_claims, write_rows, write_table
from sgsc_study.runs import PLACEMENTS, Run
from sgsc_study.search import tune
from sgsc_study.tabular import search_stored
from sgsc_study.training import check_training, train
from sgsc_study.workers import parallel, with_progress
