"""Files: atomic durable writes, validated JSON, tensor files, folder locks. Imports only errors and console."""
