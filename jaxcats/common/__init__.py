"""What every folder uses: errors, configuration, flags, files, versions, processes, signals, compilation, statistics."""
