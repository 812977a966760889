"""`python -m experiments.data --name digits --data-dir DIR`: prepares a data set, prints its splits' hashes."""

from pathlib import Path

from experiments._command import run_main
from experiments.data import load


def main(name: str = "digits", data_dir: Path | None = None) -> None:
    """Prepares a data set as array_record files, and prints the size and the SHA-256 of each split.

    Args:
      name: the data set: digits, mnist, cifar10, cifar100.
      data_dir: the folder with prepared or original files; default: $JAXCOMPRESS_DATA_DIR, else
        ~/.cache/jaxcompress/tfds.
    """
    dataset = load(name, data_dir)
    height, width, channels = dataset.train.images.shape[1:]
    print(f"{name}: images {height}x{width}x{channels}, {dataset.classes} classes")
    for split, record in dataset.records().items():
        print(f"{split:<10}  {record.examples:>6,} examples  sha256 {record.sha256}")


if __name__ == "__main__":
    run_main(main)
