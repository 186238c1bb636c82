"""Shards of videos: format, order and streaming."""
