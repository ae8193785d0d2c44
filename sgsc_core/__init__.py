"""What `sgsc_lib` is made of. It needs torch alone, and imports go one way:

checks ← definition ← rules ← calls ← look, plan, again ← sums ← recorder ← sgsc_lib
"""
