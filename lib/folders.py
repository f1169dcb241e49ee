"""Images in folders: beside a table of captions."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lib.errors import UserError


class TablePairs:
    """Image files in a folder and a table that names them, one caption a row; an image may have several rows.

    Raises:
        UserError: the table cannot be read, or names an image that is not there (with its row).
    """

    def __init__(self, table: str, folder: Path, image_column: str = "image", caption_column: str = "caption") -> None:
        from lib.tables import read_text_table

        rows = read_text_table(
            table, text_column=caption_column, text_pair_column=image_column, label_column="", require_labels=False
        )
        self.table, self.folder, self.captions, self.names = table, folder, rows.texts, rows.pairs
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for row, name in enumerate(self.names.to_pylist()):
            if name not in there:
                close = difflib.get_close_matches(name, there, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{table}: row {row + 1}: no image {name} in {folder}{hint}")

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, row: int) -> tuple[bytes, bytes]:
        """The image file and the caption of a row."""
        return (self.folder / self.names[row].as_py()).read_bytes(), self.captions[row].as_py().encode()

    def metadata(self, row: int) -> dict[str, Any]:
        """The row's other columns are not read: an empty dict."""
        return {}

    def where(self, row: int) -> str:
        """Table, row and image of a row, for a message."""
        return f"{self.table}: row {row + 1}: {self.folder / self.names[row].as_py()}"
