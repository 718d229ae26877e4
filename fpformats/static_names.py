"""The formats that type checkers, editors and tab completion know by their names.

Any other name that `fpformats.parse` takes can be imported from `fpformats` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fpformats.parsing import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fpformats.formats import FloatFormat


def _named(names: str) -> Iterator[FloatFormat]:
    return map(parse, names.split())


# 2 bits, signed
E0M1, E1M0 = _named("E0M1 E1M0")
# 2 bits, unsigned
E0M2U, E1M1U, E2M0U = _named("E0M2U E1M1U E2M0U")
# 3 bits, signed
E0M2, E1M1, E2M0 = _named("E0M2 E1M1 E2M0")
# 3 bits, unsigned
E0M3U, E1M2U, E2M1U, E3M0U = _named("E0M3U E1M2U E2M1U E3M0U")
# 4 bits, signed
E0M3, E1M2, E2M1, E3M0 = _named("E0M3 E1M2 E2M1 E3M0")
# 4 bits, unsigned
E0M4U, E1M3U, E2M2U, E3M1U, E4M0U = _named("E0M4U E1M3U E2M2U E3M1U E4M0U")
# 5 bits, signed
E0M4, E1M3, E2M2, E3M1, E4M0 = _named("E0M4 E1M3 E2M2 E3M1 E4M0")
# 5 bits, unsigned
E0M5U, E1M4U, E2M3U, E3M2U, E4M1U, E5M0U = _named("E0M5U E1M4U E2M3U E3M2U E4M1U E5M0U")
# 6 bits, signed
E0M5, E1M4, E2M3, E3M2, E4M1, E5M0 = _named("E0M5 E1M4 E2M3 E3M2 E4M1 E5M0")
# 6 bits, unsigned
E0M6U, E1M5U, E2M4U, E3M3U, E4M2U, E5M1U, E6M0U = _named(
    "E0M6U E1M5U E2M4U E3M3U E4M2U E5M1U E6M0U"
)
# 7 bits, signed
E0M6, E1M5, E2M4, E3M3, E4M2, E5M1, E6M0 = _named("E0M6 E1M5 E2M4 E3M3 E4M2 E5M1 E6M0")
# 7 bits, unsigned
E0M7U, E1M6U, E2M5U, E3M4U, E4M3U, E5M2U, E6M1U, E7M0U = _named(
    "E0M7U E1M6U E2M5U E3M4U E4M3U E5M2U E6M1U E7M0U"
)
# 8 bits, signed
E0M7, E1M6, E2M5, E3M4, E4M3, E5M2, E6M1, E7M0 = _named("E0M7 E1M6 E2M5 E3M4 E4M3 E5M2 E6M1 E7M0")
# 8 bits, unsigned
E0M8U, E1M7U, E2M6U, E3M5U, E4M4U, E5M3U, E6M2U, E7M1U, E8M0U = _named(
    "E0M8U E1M7U E2M6U E3M5U E4M4U E5M3U E6M2U E7M1U E8M0U"
)
# 8 bits, with other special values
E3M4IEEE, E4M3FN, E4M3IEEE, E4M3FNUZ, E4M3B11FNUZ, E5M2FNUZ = _named(
    "E3M4IEEE E4M3FN E4M3IEEE E4M3FNUZ E4M3B11FNUZ E5M2FNUZ"
)
# Scales
E8M0, UE4M3, UE5M3 = _named("E8M0 UE4M3 UE5M3")
# IEEE 754, and other formats that processors compute in
FP16, BF16, TF32, FP32, FP64 = _named("FP16 BF16 TF32 FP32 FP64")
