"""Shards of videos: format, order and streaming."""

from ardiff.data.plan import Plan

__all__ = ["Plan"]
