"""A client process that is killed: sends what it reads and reads what comes, until it is gone.

Run by path, with the standard library alone, so that it starts fast.

    python doomed_client.py HOST PORT < requests

Each line of the input is ``[path, body]`` in JSON. The first byte of an answer is told by a line.
"""

import http.client
import json
import sys
import threading


def ask(host: str, port: int, path: str, body: object) -> None:
    """Send one request and read its answer."""
    connection = http.client.HTTPConnection(host, port, timeout=300)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    answer = connection.getresponse()
    while answer.read1(65536):
        print("read", flush=True)


def main() -> None:
    """Send everything at once."""
    host, port = sys.argv[1], int(sys.argv[2])
    threads = [
        threading.Thread(target=ask, args=(host, port, *json.loads(line))) for line in sys.stdin
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
