"""What a run tells about itself: metrics.jsonl, TensorBoard, the console, throughput."""
