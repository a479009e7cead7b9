"""Work rules, one family of primitives a file. Importing this package registers them all."""

from partition.rules import elementwise, matmul, movement, opaque, random, reduction

__all__ = ["elementwise", "matmul", "movement", "opaque", "random", "reduction"]
