"""Templates of clusters: data files of the package. They come with the launch on many hosts."""
