"""What `sgsc_lib` is made of. It needs torch alone, and imports go one way:

checks ← definition ← rules ← calls ← look, plan, again, shared ← sums ← confirm ← recorder ← sgsc_lib
"""
