"""Jobs over data that `pipelines` delivers: training, registry, downstream evaluation, and the `lorot` command."""
