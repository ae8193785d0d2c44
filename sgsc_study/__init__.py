"""The study: what tests SGSC. A module imports only those that stand before it in this list.

parameters  what a notebook's parameter may be       workers    processes, a cluster, the fingerprint of arithmetic
data        MNIST-1D and its splits                  training   `train`: stacks of runs on all cores, from the cache
gates       SGSC's gate and its relatives            search     `tune`: Optuna's searches
measures    smoothness, the verdict on two arms      results    result files and claims
runs        one run as data, and what runs left      figures    captioned figures and tables
engine      a stack of runs, step by step            notebook   `begin`: a notebook's first cell
cache       what was computed, by which code         testing    for the tests of a gate or rule of one's own
"""

from sgsc_study.cache import CACHE, ROOT
from sgsc_study.data import Dataset, draw_mnist1d, load_mnist1d
from sgsc_study.figures import figure, table, with_interval
from sgsc_study.gates import GATES, RELATIVES, align_runs
from sgsc_study.measures import PairedComparison, compare_paired, smoothness, t_comparison
from sgsc_study.notebook import begin
from sgsc_study.results import claim, read_table, write_claims, write_table
from sgsc_study.runs import PLACEMENTS, Curves, Run
from sgsc_study.search import tune
from sgsc_study.training import check_training, train
from sgsc_study.workers import parallel, with_progress
