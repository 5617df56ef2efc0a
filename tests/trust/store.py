def add_options(p): p.add_argument("--seed", type=int, default=0)
def attack(s): return {}, []
