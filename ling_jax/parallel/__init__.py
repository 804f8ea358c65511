"""The mesh, the one table of what is split over it, and the exchanges between its devices.

Model code is written for one device's shards and runs in one manual region over all axes (`mesh.manual`);
outside such a region every function here acts as on one device.
"""
