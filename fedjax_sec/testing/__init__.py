"""The contract that every component keeps, for those of this package and for anybody's.

    from fedjax_sec.testing import check_component

    def test_my_rule():
        check_component(MyRule)

It runs on tiny worlds, one for each kind of input, in seconds to a minute on a CPU.
"""

from fedjax_sec.testing import (
    augmentations,
    clients,
    data_attacks,
    defenses,
    fields,
    local_defenses,
    looking,
    materials,
    update_attacks,
)
from fedjax_sec.testing.compare import both_ways, close, same_bits
from fedjax_sec.testing.component import check_component, checks_of, kind_of, variants_of
from fedjax_sec.testing.worlds import (
    CLASSES,
    HIDDEN,
    MEAN,
    SHAPE,
    STD,
    World,
    kinds_of,
    sample,
    tiny_pool,
    tiny_task,
    world,
)

__all__ = [
    "CLASSES",
    "HIDDEN",
    "MEAN",
    "SHAPE",
    "STD",
    "World",
    "augmentations",
    "both_ways",
    "check_component",
    "checks_of",
    "clients",
    "close",
    "data_attacks",
    "defenses",
    "fields",
    "kind_of",
    "kinds_of",
    "local_defenses",
    "looking",
    "materials",
    "same_bits",
    "sample",
    "tiny_pool",
    "tiny_task",
    "update_attacks",
    "variants_of",
    "world",
]
