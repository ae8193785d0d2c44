"""Which vector instructions a build asks for; to be imported before NumPy, which reads it when it is imported.

Each of these libraries takes the widest vectors that a processor has, and with them another order of a sum or another
logarithm. Runs then drift apart, and searches end at other winners. AVX2 is what nearly every x86-64 has; a variable
that is set already stays as it is.
"""

import os
from pathlib import Path

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
