"""What a run costs before it is run: parameters, floating-point operations, memory, disk, hours, money."""

from tailkd.ledger.bill import Bill, Generation, Hardware, Selection, Stages, Student, Teachers, Training, bill, stages
from tailkd.ledger.cache import Cache, cache
from tailkd.ledger.flops import PAPER
from tailkd.ledger.memory import Memory, Teacher, memory
from tailkd.ledger.parameters import Parameters, count
from tailkd.ledger.rehearsal import Batch

__all__ = [
    "PAPER",
    "Batch",
    "Bill",
    "Cache",
    "Generation",
    "Hardware",
    "Memory",
    "Parameters",
    "Selection",
    "Stages",
    "Student",
    "Teacher",
    "Teachers",
    "Training",
    "bill",
    "cache",
    "count",
    "memory",
    "stages",
]
