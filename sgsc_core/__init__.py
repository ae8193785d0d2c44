"""What `sgsc_lib` is made of. It needs torch alone, and imports go one way:

checks ← definition ← gradients ← rules ← calls ← shared ← look, plan, again ← sums ← fused, confirm ← backward
← recorder ← sgsc_lib
"""
