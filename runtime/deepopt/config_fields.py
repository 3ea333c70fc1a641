"""What the sections of the job are made of: checked values, the frozen base, and refusals.

Numbers are checked strictly: `true` and `"3"` are not integers, and no number is infinite. What
this module does not do: know any key of the job (`deepopt.config` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from deepopt.import_path import IMPORT_PATH_REMEDY, is_import_path

REFUSED = "deepopt"  # the pydantic error type of `refuse`


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def refuse(message: str, *, remedy: str, fields: Sequence[str] = ()) -> NoReturn:
    """Refuse a value from inside a validator; `deepopt.job_file` adds file, line and key.

    Args:
        message: what is wrong, with the value.
        remedy: the next step.
        fields: the fields of the section that do not fit together; none for the value itself.
            The first that the user wrote is the one that is named.

    Raises:
        PydanticCustomError: always; pydantic gathers it.
    """
    context = {"message": message, "remedy": remedy, "fields": tuple(fields)}
    raise PydanticCustomError(REFUSED, "{message}", context)


def _check_import_path(path: str) -> str:
    if not is_import_path(path):
        refuse(f"{path!r} is not an import path", remedy=IMPORT_PATH_REMEDY)
    return path


Text = Annotated[str, Field(min_length=1)]
ImportPath = Annotated[str, AfterValidator(_check_import_path)]
Count = Annotated[int, Strict(), Field(ge=1)]
Index = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[float, Strict(), Field(gt=0)]
Figure = Annotated[float, Strict(), Field(ge=0)]
PerLayer = Figure | tuple[Figure, ...]
Seconds = Annotated[float, Strict(), Field(gt=0)]
MomentDecay = Annotated[float, Strict(), Field(ge=0, lt=1)]
