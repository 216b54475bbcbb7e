"""Jobs over data that `pipelines` delivers: training, the model registry, downstream evaluation, the `lorot` command."""
