"""What a build asks of its surroundings: vector instructions, and no settings of the user's; imported before NumPy.

Each of these libraries takes the widest vectors that a processor has, and with them another order of a sum or another
logarithm. Runs then drift apart, and searches end at other winners. AVX2 is what nearly every x86-64 has; a variable
that is set already stays as it is.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLES = {  # PyTorch's own kernels, MKL, oneDNN; in NumPy's words, AVX-512 is the fourth level of x86-64
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4",
}
CPUINFO = Path("/proc/cpuinfo")
if CPUINFO.exists() and " avx2 " in CPUINFO.read_text():
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)

# What Python and matplotlib are told changes what notebooks print; where modules are found stays as it is.
OWN_MODULES = {"PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE"}
for name in {name for name in os.environ if name.startswith("PYTHON")} - OWN_MODULES | {"MPLBACKEND"}:
    os.environ.pop(name, None)
os.environ |= {"PYTHONUTF8": "1", "MATPLOTLIBRC": str(Path(__file__).with_name("sgsc.mplstyle"))}


@contextmanager
def without_settings() -> Iterator[None]:
    """A block in which Jupyter and IPython find nothing of the user's, and write nothing to the home."""
    before = dict(os.environ)
    with TemporaryDirectory(prefix="sgsc-") as empty:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            os.environ[name] = empty
        os.environ["JUPYTER_PATH"] = f"{sys.prefix}/share/jupyter"  # so that `python3` is this interpreter's kernel
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before
