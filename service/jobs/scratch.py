"""/tmp of a job's container: the only place for remote files there, and how much of it they may fill. No torch."""

from service.data_config import SplitsConfig
from service.errors import ConfigError
from service.jobs import traits

# Of /tmp. The rest is for what is compiled there, and for files that left the cache while somebody still reads them.
_SHARE = 0.5


def cache_gb(data: SplitsConfig, backend: str) -> float:
    """How much of the files of a URL a job keeps: `data.cache_gb`, or what fits where that was left at its default.

    Raises:
        ConfigError: more is asked for than /tmp of its containers may hold.
    """
    tmp_gib = traits.of(backend).tmp_gib
    if tmp_gib is None or "://" not in str(data.root):
        return data.cache_gb
    most = round(_SHARE * tmp_gib * 2**30 / 10**9, 1)
    if data.cache_gb <= most:
        return data.cache_gb
    if data.cache_gb == SplitsConfig.model_fields["cache_gb"].default:
        return most
    raise ConfigError(
        f"config.data.cache_gb: {data.cache_gb:g} GB do not fit into /tmp of a {backend} job, which holds "
        f"{tmp_gib} GiB; give at most {most:g}, or leave it away. A set that is larger is read with "
        "data.order=blocks, or from a folder below data_roots"
    )
