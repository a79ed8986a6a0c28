"""The package's version."""

__version__ = "0.1.0"


def torch_series() -> str:
    """Major and minor version of torch, such as `2.9`: a part of the keys of what is trained and scored.

    Kernels change between torch versions, and the last bits of sums with them. The same key promises the same content, so the version
    belongs to the key. A patch release mends faults and leaves kernels as they are: with it in the key, weeks of training would be
    thrown away every month. Other packages are not in the key: they prepare the work, and torch computes.
    """
    from importlib.metadata import version

    return ".".join(version("torch").split("+")[0].split(".")[:2])
