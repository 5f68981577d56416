"""JSON that another stage has written, as typed records."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from crossdiff.errors import UserError
from crossdiff.files import read_json

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A JSON record of which later versions may hold more than is read here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def read(cls: type[R], path: Path, command: str) -> R:
        """Read a file of this record.

        Args:
            command: what writes the file.

        Raises:
            UserError: it is missing, damaged or of another version; the message names the first wrong key.
        """
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(f"{path}: {key}: {first['msg']}; run `{command}` again") from error
