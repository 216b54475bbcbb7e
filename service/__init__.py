"""Jobs over data that `pipelines` delivers: training, registry, downstream evaluation, the `lorot` command."""
