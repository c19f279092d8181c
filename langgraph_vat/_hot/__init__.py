"""The hot tier: key names, entry and head formats, scripts, and the copies a process keeps."""
