"""Text files and the data configurations that read them."""

from pathlib import Path

from ling_jax.config import DataConfig, DataSource


def config_of(*paths, **changes) -> DataConfig:
    return DataConfig(sources=tuple(DataSource(path=str(path)) for path in paths), **changes)


def write_texts(folder: Path, count: int, size: int = 300) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"text {i}\n" + f"{i} is a number\n" * (size // 15))
    return folder
