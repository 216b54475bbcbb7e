"""/tmp of a job's container: the only place for remote files there, and how much of it they may fill. No torch."""

from types import MappingProxyType

from service.data_config import SplitsConfig
from service.errors import ConfigError

# What /tmp of a node holds, GiB: memory on a Docker engine, the machine's disk in a cluster. Local jobs have no bounds.
GIB = MappingProxyType({"docker": 2, "kubernetes": 20})
# The rest is for what is compiled there, and for files that left the cache while somebody still reads them.
_SHARE = 0.5


def cache_gb(data: SplitsConfig, backend: str) -> float:
    """How much of the files of a URL a job keeps: `data.cache_gb`, or what fits where that was left at its default.

    Raises:
        ConfigError: more is asked for than /tmp of its containers may hold.
    """
    if backend not in GIB or "://" not in str(data.root):
        return data.cache_gb
    most = round(_SHARE * GIB[backend] * 2**30 / 10**9, 1)
    if data.cache_gb <= most:
        return data.cache_gb
    if data.cache_gb == SplitsConfig.model_fields["cache_gb"].default:
        return most
    raise ConfigError(
        f"config.data.cache_gb: {data.cache_gb:g} GB do not fit into /tmp of a {backend} job, which holds "
        f"{GIB[backend]} GiB; give at most {most:g}, or leave it away. A set that is larger is read with "
        "data.order=blocks, or from a folder below data_roots"
    )
