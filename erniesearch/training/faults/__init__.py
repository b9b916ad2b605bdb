"""What can go wrong in a training: numbers, ranks, disks, and being asked to stop."""
