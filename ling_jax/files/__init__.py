"""Files on disks and in buckets: arrays with checksums, JSON, folders with one writer, caches."""
