"""The intermediate representation: expressions, programs, tile kernels. Standard library only.

    expr     = Const | Var | Load | Call | Full | FirstColumns | Dot | Reduce | Cast      (expr.py)
    program  = Attention(score: ScalarFn?, mask: ScalarFn?, rule: OnlineRule, ...)         (program.py)
    stmt     = Section | Let | Loop | If | StoreTile | Accumulate | Narrow | Choose        (tile.py)
    kernel   = Kernel(params, scalars, grid, order, tile, body);  module = Module(kernels) (tile.py)

The grammar of each is in its file's docstring; a test holds it against the classes.
"""
