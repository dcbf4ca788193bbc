"""Ask a plaintext gRPC health port whether it serves: exit code 0 if so, 1 if not.

For runtimes that have no gRPC probe of their own, such as Docker and Compose.

    python healthcheck.py ADDRESS [SERVICE]

SERVICE is empty for readiness, or ``liveness``.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(address: str, service: str = "") -> int:
    """Return the exit code for the server at HOST:PORT."""
    request = health_pb2.HealthCheckRequest(service=service)
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
