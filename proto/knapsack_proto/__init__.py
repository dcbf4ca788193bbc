"""Wire contract of knapsack-rl: protobuf messages and gRPC stubs."""
