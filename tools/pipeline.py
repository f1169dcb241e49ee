"""From a data version to a pushed model, in one command; the steps are those of accelerando.pipeline.

python tools/pipeline.py --config_path configs/text_trec.yaml --output_dir pipelines/trec --dry_run
python tools/pipeline.py --output_dir pipelines/trec scripts/text_classify.py --config configs/text_trec.yaml
"""

from __future__ import annotations

import sys

from accelerando.base.config import parse_args
from accelerando.base.errors import errors_in_one_line
from accelerando.pipeline import ALIASES, Args, run_pipeline, split_words


def main() -> None:
    ours, script = split_words(sys.argv[1:])
    if not ours and not script:
        ours = ["--help"]
    args = parse_args(Args, ALIASES, ours)
    run_pipeline(**{**vars(args), "words": tuple(script)})


if __name__ == "__main__":
    with errors_in_one_line():
        main()
