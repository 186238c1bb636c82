"""What shard_videos and extract_latents are made of: which frames go where, decoding ahead, encoding, ranks."""
