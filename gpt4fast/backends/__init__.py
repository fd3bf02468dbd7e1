"""Implementations of the ops: ``dispatch`` chooses one, each of the others holds one."""
