"""What DreamSPI needs besides the scripts: the replay buffer, the distance that a discriminator sees, pictures of dreams."""
