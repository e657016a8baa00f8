"""What another cache would have done with the requests of a recorded run. Pure: arrays in, numbers out."""
