"""Make the demo's class folders: the 1,797 handwritten digits that ship with scikit-learn, as PNG files.

Thirteen people wrote them; they have 8 x 8 pixels in 17 grey levels (Alpaydin and Kaynak 1998). Here they are dark on
white, with a margin, enlarged to 40 x 40. Called again once tools/split_folds.py has split them, this program also says
how far logistic regression gets on the test images.

  python data/make_image_demo.py --output_dir data/demo_image
  python tools/split_folds.py --raw_data data/demo_image/raw --folds 5
  python data/make_image_demo.py --output_dir data/demo_image
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import whole_folder, write_text
from accelerando.data.folders import read_class_map, read_index

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MADE_WITH = {"maker": "make_image_demo.py", "version": 1}  # version: incremented when the images change
LEVELS = 16  # the value of the darkest ink; paper is 0
MARGIN = 1  # of paper around the 8 x 8 pixels: evaluation cuts a sixteenth of the image off each side
SCALE = 4


@dataclass
class Args:
    # -- output --
    output_dir: str = "data/demo_image"  # folder to write raw/0 to raw/9 to
    baseline: bool = True  # where splits/ is there: logistic regression on the test images, into baseline.json
    config: tuple[str, ...] = ()  # YAML files with any of these settings


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink of each pixel, 0 to 16, float64 [1797, 8, 8], and the digits, int [1797].

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from None
    digits = datasets.load_digits()
    return digits.images, digits.target


def draw(ink: np.ndarray) -> Image.Image:
    """The image of ``ink``, 0 to 16 [8, 8]: black on white, 40 x 40 pixels, smoothly enlarged."""
    import numpy as np
    from PIL import Image

    grey = np.rint(255 * (1 - np.pad(ink, MARGIN) / LEVELS)).astype(np.uint8)
    image = Image.fromarray(grey)
    return image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.BICUBIC)


def images() -> Iterator[tuple[str, Image.Image]]:
    """File, relative to the output folder, and image: raw/<digit>/<row in scikit-learn's set>.png."""
    for row, (ink, digit) in enumerate(zip(*load_digits(), strict=True)):
        yield f"raw/{digit}/{row:04d}.png", draw(ink)


def write_images(folder: Path) -> int:
    """Writes all of them, whole or not at all, and returns how many they are."""
    count = 0
    try:
        with whole_folder(folder) as draft:
            for name, image in images():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(draft / name)
                count += 1
            (draft / "made.json").write_text(json.dumps(MADE_WITH) + "\n", encoding="utf-8")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    return count


def check_images(folder: Path) -> int:
    """How many images are in ``folder``.

    Raises:
        UserError: one is missing, damaged or changed.
    """
    import numpy as np
    from PIL import Image

    count = 0
    for name, image in images():
        try:
            with Image.open(folder / name) as found:
                same = np.array_equal(np.asarray(found), np.asarray(image))
        except (OSError, SyntaxError, ValueError) as error:
            same = False
            what = "is missing" if isinstance(error, FileNotFoundError) else "is corrupted"
        else:
            what = "was changed"
        if not same:
            raise UserError(f"{folder / name} {what}: delete {folder} and run this again to make all of them again")
        count += 1
    return count


def is_made(folder: Path) -> bool:
    """True where ``folder`` holds what this program writes, False where there is nothing, or images of an older one.

    Raises:
        UserError: it is not a folder, or it holds something else.
    """
    if not folder.exists():
        return False
    try:
        made_with = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        made_with = None
    if isinstance(made_with, dict) and made_with.get("maker") == MADE_WITH["maker"]:
        return made_with == MADE_WITH
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    raise UserError(f"--output_dir {folder}: there, but not made by this program; name a new folder")


def read_flat(folder: Path, index: str, classes: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ink, 0 to 16, of the images in an index file, 10 x 10 with the margin: float64 [n, 100]; their classes [n]."""
    import numpy as np
    from PIL import Image

    files = read_index(folder / "splits" / index, classes)
    inputs = []
    for row in range(len(files)):
        try:
            with Image.open(files.path(row)) as image:
                side = 8 + 2 * MARGIN
                small = image.convert("L").resize((side, side), Image.Resampling.BOX)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{files.path(row)}: {first_line(error)}") from None
        inputs.append(LEVELS * (1 - np.asarray(small, np.float64).ravel() / 255))
    return np.array(inputs), files.classes


def baseline(folder: Path) -> float:
    """Accuracy in 0..1 of logistic regression, the usual first attempt: trained on all that is not test."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    classes = read_class_map(folder / "splits")
    parts = [read_flat(folder, f"fold_0_{side}.txt", classes) for side in ("train", "val")]
    inputs, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    found = LogisticRegression(max_iter=5000).fit(inputs, labels)
    return float(found.score(*read_flat(folder, "test.txt", classes)))


def main() -> None:
    args = parse_args(Args)
    folder = Path(args.output_dir)
    if is_made(folder):
        count, where = check_images(folder), "already in"
    else:
        count, where = write_images(folder), "written to"
    print(f"{count:,} images of 10 digits: {where} {folder / 'raw'}")
    if args.baseline and (folder / "splits" / "test.txt").is_file():
        accuracy = round(baseline(folder), 4)
        write_text(folder / "baseline.json", json.dumps({"logistic_regression": accuracy, "chance": 0.1}) + "\n")
        print(f"Logistic regression on the test images: {100 * accuracy:.1f} %")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
