"""A private Ray that others may join, alive until stdin is closed: `python -m support.ray_host N`.

With an address of such a Ray after N, it is a further host of that one.
"""

from __future__ import annotations

import json
import os
import sys

from deepopt.cluster import ray_node
from deepopt.cluster.fork_server import start_fork_server
from deepopt.cluster.process_table import become_subreaper, kill_descendants

KILL_TIMEOUT_S = 60.0


def main() -> None:
    become_subreaper()
    token = os.environ.get("RAY_AUTH_TOKEN") or ray_node.make_token()
    joined = sys.argv[2] if len(sys.argv) > 2 else None
    ray_node.prepare_environment(threads=1, token=token, loopback=True)
    temp_dir = ray_node.make_temp_dir()
    start_fork_server(temp_dir)
    node = ray_node.start_node(
        ray_node.NodeRequest(
            node_ip=ray_node.LOOPBACK,
            gcs_address=joined,
            slots=int(sys.argv[1]) - (joined is None),  # the head host has one more CPU
            use_gpus=False,
            temp_dir=str(temp_dir),
            object_store_bytes=80 * ray_node.MIB,
            is_shared=True,
        )
    )
    environment = {
        name: os.environ[name]
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    }
    told = {**environment, "ADDRESS": node.gcs_address, "TEMP_DIR": str(temp_dir)}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    kill_descendants(timeout_s=KILL_TIMEOUT_S)
    ray_node.remove_temp_dir(temp_dir)
    os._exit(0)


if __name__ == "__main__":
    main()
