"""What scan_videos is made of: inputs and lists, scene cuts, near-duplicates, splits, results kept between runs."""
