"""FedML's FedSecurity beside ours: its configurations converted, its classes wrapped."""

from fedjax_sec.fedml.arguments import Note
from fedjax_sec.fedml.conversion import Converted, convert
from fedjax_sec.fedml.wrapping import wrap

__all__ = ["Converted", "Note", "convert", "wrap"]
