"""Algorithms: the clients' messages and the server's step, one component a file.

`Averaging` is the base of algorithms whose server steps along the aggregate of the clients'
updates; algorithms of one's own compose its parts.
"""

from fedjax_sec.algorithms._averaging import Averaging, Server

__all__ = ["Averaging", "Server"]
