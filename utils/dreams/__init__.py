"""Components of DreamSPI: replay buffer, end predictor, optimizers, discriminator, and figures of dreams."""
