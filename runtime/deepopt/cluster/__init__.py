"""Where processes run: hosts, Ray clusters, worker groups."""
