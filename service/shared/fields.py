"""Field types that requests and stored rows share."""

from decimal import Decimal
from typing import Annotated

from pydantic import Field, PlainSerializer

# Decimals are exact in the database and in comparisons. In JSON they are plain numbers.
ExactNumber = Annotated[
    Decimal, Field(max_digits=12, decimal_places=6), PlainSerializer(float, return_type=float, when_used="json")
]

GuidanceScale = Annotated[ExactNumber, Field(ge=0, le=1000)]
Eta = Annotated[ExactNumber, Field(ge=0, le=1)]
NumSteps = Annotated[int, Field(ge=1, le=100_000)]
IDENTIFIER = {"min_length": 1, "max_length": 64, "pattern": r"^[A-Za-z0-9_.\-]+$"}
Identifier = Annotated[str, Field(**IDENTIFIER)]
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
Seed = Annotated[int, Field(ge=0, lt=2**31)]
